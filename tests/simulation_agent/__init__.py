"""An agent through a simulated year."""
