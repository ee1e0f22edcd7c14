"""Things without domain words: database session, money, ids, clock, secrets, pagination, HTTP."""
