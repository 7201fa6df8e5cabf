// The best scores of each row, exactly: one workgroup per row. Scores become unsigned keys of the same order,
// protected slots the highest key. Four rounds over 8 bits each find the key of the k-th best and how many of
// its equals are still wanted; a stable compaction then takes everything above it and the first equals, which
// are the lower slots. Integers throughout: the chosen set has the same bits on every device.

#import group

struct Params {
    count: u32,
    spare_a: u32,
    spare_b: u32,
    spare_c: u32,
}

struct Row {
    start: u32,
    length: u32,
    wanted: u32,
    target_at: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> rows: array<Row>;
// Bits of the scores.
@group(0) @binding(2) var<storage, read> scores: array<u32>;
// One byte per score, four to a word.
@group(0) @binding(3) var<storage, read> protect: array<u32>;
@group(0) @binding(4) var<storage, read_write> chosen: array<u32>;

const THREADS: u32 = 256u;

var<workgroup> histogram: array<atomic<u32>, 256>;
// The bin of this round and how many are wanted from it.
var<workgroup> found: array<u32, 2>;
// Running counts of taken and equal slots, packed low and high.
var<workgroup> scan: array<vec2<u32>, 256>;

fn key_of(at: u32) -> u32 {
    if ((protect[at / 4u] >> (8u * (at % 4u))) & 0xffu) != 0u {
        return 0xffffffffu;
    }
    // -0 equals +0.
    let bits = select(scores[at], 0u, scores[at] == 0x80000000u);
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) id: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) t: u32,
) {
    let index = group_index(id, groups);
    if index >= params.count {
        return;
    }
    let row = rows[index];
    if row.wanted == 0u {
        return;
    }
    // Bits of the threshold found so far, and how many of the slots that share them are wanted.
    var prefix = 0u;
    var mask = 0u;
    var wanted = row.wanted;
    for (var round = 0u; round < 4u; round++) {
        let shift = 24u - 8u * round;
        atomicStore(&histogram[t], 0u);
        workgroupBarrier();
        for (var j = t; j < row.length; j += THREADS) {
            let key = key_of(row.start + j);
            if (key & mask) == prefix {
                atomicAdd(&histogram[(key >> shift) & 0xffu], 1u);
            }
        }
        workgroupBarrier();
        if t == 0u {
            var left = wanted;
            var bin = 255u;
            while bin > 0u && atomicLoad(&histogram[bin]) < left {
                left -= atomicLoad(&histogram[bin]);
                bin--;
            }
            found[0] = bin;
            found[1] = left;
        }
        workgroupBarrier();
        prefix |= found[0] << shift;
        mask |= 0xffu << shift;
        wanted = found[1];
        workgroupBarrier();
    }

    // Slots taken and equals seen in the chunks before this one.
    var taken = 0u;
    var equals = 0u;
    for (var first = 0u; first < row.length; first += THREADS) {
        let slot = first + t;
        var above = 0u;
        var equal = 0u;
        if slot < row.length {
            let key = key_of(row.start + slot);
            above = u32(key > prefix);
            equal = u32(key == prefix);
        }
        // Inclusive sums over the chunk, doubling the reach in each round.
        scan[t] = vec2<u32>(above, equal);
        workgroupBarrier();
        for (var reach = 1u; reach < THREADS; reach *= 2u) {
            var sum = scan[t];
            if t >= reach {
                sum += scan[t - reach];
            }
            workgroupBarrier();
            scan[t] = sum;
            workgroupBarrier();
        }
        // Equals count as taken up to the number wanted, so the place of a slot follows from the two sums.
        let before = scan[t] - vec2<u32>(above, equal);
        let place = taken + before.x + min(equals + before.y, wanted) - min(equals, wanted);
        if above == 1u || (equal == 1u && equals + before.y < wanted) {
            chosen[row.target_at + place] = slot;
        }
        let all = scan[THREADS - 1u];
        taken += all.x + min(equals + all.y, wanted) - min(equals, wanted);
        equals += all.y;
        workgroupBarrier();
    }
}
