"""Jobs: settings become requests, a run folder is compared, missing samples are made."""
