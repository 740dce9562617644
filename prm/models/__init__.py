"""Reward models: how they are loaded, saved, adapted and converted."""
