"""The HTTP edge: what is served over plain HTTP. It holds no rules of its own; `app` hands it what it serves."""
