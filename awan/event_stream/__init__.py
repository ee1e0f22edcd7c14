"""Room: an account's events as they happen, over server-sent events (`GET /events`)."""
