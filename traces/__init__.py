"""Small request traces, shipped as package data."""
