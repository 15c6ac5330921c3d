"""Generates answers with local models and with models behind endpoints."""
