"""Files and folders that appear by rename, versions, and where state is kept."""
