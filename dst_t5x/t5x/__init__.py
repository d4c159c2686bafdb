"""The plug-in for genuine T5X, see docs/t5x.md. No other room imports it."""
