// What one workgroup of the kernels works on that give values per stored entry, a thread per entry.

// Up to 64 entries of one page of one KV head.
struct Chunk {
    // Word of the page, first row, rows.
    page: u32,
    begin: u32,
    rows: u32,
    // Output of the chunk's first entry, and floats from one query row to the next.
    target_at: u32,
    stride: u32,
    // Tiles of the head: the first one, and those that may see the chunk.
    tile: u32,
    tile_begin: u32,
    tile_end: u32,
}
