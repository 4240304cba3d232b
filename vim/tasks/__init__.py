"""Tasks: data, model, loss, metric and pictures of what a run learns."""
