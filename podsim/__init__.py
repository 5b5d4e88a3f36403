"""podsim."""
