"""A service: the images and labels of one model over HTTP, several clients sharing its batches."""
