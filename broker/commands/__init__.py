"""The subcommands of `energy-broker`: one module a group, each with an `add_commands` that adds its parsers."""
