"""The plug-in for genuine T5X; nothing else imports it. See docs/t5x.md."""
