"""What the server tells about itself: counters, levels and latencies in `metrics`, lines in `logs`.

Nothing here runs per event beyond adding to a plain number: counting must not cost what it measures.
"""
