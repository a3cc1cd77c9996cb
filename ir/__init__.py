"""The intermediate representation: graph, operator records, axis algebra, and the analyses derived from them."""
