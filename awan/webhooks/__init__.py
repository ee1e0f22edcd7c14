"""Room: webhooks. An account's events are posted to its endpoints, signed as standardwebhooks.com describes.

Three movements, each in short transactions: `deliveries.fan_out` makes a delivery of every event and endpoint that
wants it, `deliveries.claim` leases what is due, `sender` posts it (outside of any transaction) and records the attempt.
A delivery is sent at least once: who dies in between lets its lease run out, and it is sent again under the same id.
"""
