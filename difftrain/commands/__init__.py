"""What the commands do. Each is a function of the parsed arguments that returns an exit code."""
