// A dispatch of more than 65,535 workgroups is laid out in two dimensions; the last line may be longer than
// needed, so every kernel compares the index with its count.
fn group_index(id: vec3<u32>, groups: vec3<u32>) -> u32 {
    return id.y * groups.x + id.x;
}
