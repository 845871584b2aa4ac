"""What an engine reports of itself: metrics, log events, statistics."""
