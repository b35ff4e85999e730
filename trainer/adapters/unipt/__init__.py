"""UniPT: a narrow network beside a frozen model, through which no gradient passes."""
