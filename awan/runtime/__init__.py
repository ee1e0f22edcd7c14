"""What runs the product on one machine: embedded PostgreSQL, the supervisor of our processes, logs.

A production site may replace all of it: systemd for the supervisor, any PostgreSQL >= 15 for the embedded one.
"""
