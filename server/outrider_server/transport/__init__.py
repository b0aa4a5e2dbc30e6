"""The only room that speaks HTTP out: one signed request in, one outcome back."""
