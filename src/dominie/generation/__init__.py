"""Generates answers with local models and models behind endpoints."""
