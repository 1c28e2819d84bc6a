"""The hard world: table-tops with sixteen kinds of things of many forms, some of them rare, among clutter."""
