"""What each command does: run, check, init, sweep, chat; and model cards."""
