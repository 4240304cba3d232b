"""Images and labels for training: data sets that need no files, timm's readers, and the loaders over both."""
