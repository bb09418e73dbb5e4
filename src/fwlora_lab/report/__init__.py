"""From records to one page with tables, pictures and model cards; trains nothing."""
