"""Which of the findings hold: arms, measures, claims, reports."""
