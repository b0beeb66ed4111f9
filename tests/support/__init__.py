"""What several tests use: random valid messages, and the check of real traffic against the published schema."""
