"""What runs while nobody waits: scoring, choosing, retraining."""
