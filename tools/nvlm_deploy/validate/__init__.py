"""Is a candidate as good as its reference? Task accuracy in-process and over a server, judged against bars."""
