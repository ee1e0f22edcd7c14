"""What tests share: the database server, builders of rows, and the proofs of durable work."""
