"""Rules of delivery as pure functions and small machines: no I/O, no clock, no randomness of their own."""
