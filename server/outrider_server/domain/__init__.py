"""The words of the product as plain values: no I/O, no clock, no rules of other rooms."""
