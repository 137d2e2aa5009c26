"""What runs the fleet elsewhere than in a shell; not installed."""
