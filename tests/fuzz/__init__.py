"""Coverage-guided fuzzing of everything that reads bytes off a wire: `make fuzz`, and a short run in `make test`."""
