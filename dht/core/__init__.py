"""The sans-IO part of the DHT: no clock, no socket, no global randomness; time and randomness are arguments."""
