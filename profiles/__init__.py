"""Fitted kernel profiles, shipped as package data."""
