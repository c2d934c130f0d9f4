"""Exchanges between ranks: whole, in pieces, and over symmetric memory."""
