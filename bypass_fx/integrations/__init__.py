"""Callbacks for the trainers that people already use; each framework's own ways stay in one file."""
