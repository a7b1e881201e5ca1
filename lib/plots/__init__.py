"""Arrays and tables in, a matplotlib `Figure` out."""
