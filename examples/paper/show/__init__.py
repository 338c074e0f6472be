"""Results as tables and figures; nothing here is measured, so a change here makes no row be done again."""
