"""The page of a run in gallery/: its data, thumbnails and pictures, and a server for it.

index.html, gallery.css and the scripts logic.js and gallery.js are the same for every run. Scripts that hold data say
what a run has to show: run.js for all samples, pages/ for a thousand each, details/ for as many as a sheet of
thumbnails has; left-out.js says what a filter decided. A browser loads scripts from a disk, which it does not do with
JSON files.
"""
