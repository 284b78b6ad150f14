"""Captioned pictures: where they come from, how they are packed into shards, and how training reads them again."""
