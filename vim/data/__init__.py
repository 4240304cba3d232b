"""Images and labels: data sets in memory and in files, timm's readers, and loaders."""
