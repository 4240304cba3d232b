"""Files of weights: `io` writes and reads ours, `upstream` reads those the original released."""
