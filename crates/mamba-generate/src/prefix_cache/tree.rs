//! A radix tree over tokens, some of whose nodes hold a value; those not used for the longest time go first.

use std::collections::{BTreeMap, HashMap};

/// Paths from the root spell sequences of tokens. Every node but the root holds a value or is where sequences part.
#[derive(Debug)]
pub(super) struct Tree<T> {
    /// Node 0 is the root; those that were removed are listed in `free`.
    nodes: Vec<Node<T>>,
    free: Vec<usize>,
    /// When each value was last used, and at which node it is.
    order: BTreeMap<u64, usize>,
    clock: u64,
    bytes: usize,
    /// The parts that values share, and how many values hold each of them.
    shared: HashMap<usize, usize>,
}

#[derive(Debug)]
struct Node<T> {
    /// The tokens from the parent to here.
    edge: Vec<u32>,
    parent: usize,
    /// By the first token of their edges.
    children: BTreeMap<u32, usize>,
    value: Option<Value<T>>,
}

#[derive(Debug)]
struct Value<T> {
    value: T,
    /// What it alone takes.
    bytes: usize,
    /// What others may hold too: parts by number, and their bytes.
    shared: Vec<(usize, usize)>,
    used: u64,
}

/// What a tree knows of a sequence.
pub(super) struct Found<'a, T> {
    /// How many of its first tokens are in the tree.
    pub(super) known: usize,
    /// How many of them stand before the deepest value that would do.
    pub(super) depth: usize,
    /// That value.
    pub(super) state: Option<&'a T>,
}

const ROOT: usize = 0;

fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl<T> Tree<T> {
    pub(super) fn new() -> Self {
        let root = Node { edge: Vec::new(), parent: ROOT, children: BTreeMap::new(), value: None };
        Self {
            nodes: vec![root],
            free: Vec::new(),
            order: BTreeMap::new(),
            clock: 0,
            bytes: 0,
            shared: HashMap::new(),
        }
    }

    /// How many values there are.
    pub(super) fn states(&self) -> usize {
        self.order.len()
    }

    /// The bytes of all values and all tokens; a part that several values hold counts once.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Looks for the beginnings of `ids`, and uses the deepest value for which `would_do` holds, given its depth.
    pub(super) fn find(&mut self, ids: &[u32], would_do: impl Fn(usize, &T) -> bool) -> Found<'_, T> {
        let (mut node, mut at, mut known, mut best) = (ROOT, 0, 0, None);
        loop {
            if let Some(value) = &self.nodes[node].value
                && would_do(at, &value.value)
            {
                best = Some((node, at));
            }
            let Some(&child) = ids.get(at).and_then(|id| self.nodes[node].children.get(id)) else { break };
            let edge = &self.nodes[child].edge;
            let common = shared(edge, &ids[at..]);
            known = at + common;
            if common < edge.len() {
                break;
            }
            (node, at) = (child, known);
        }
        let Some((node, depth)) = best else { return Found { known, depth: 0, state: None } };
        self.touch(node);
        Found { known, depth, state: self.nodes[node].value.as_ref().map(|value| &value.value) }
    }

    /// Puts a value after `ids`, in the place of one that may be there.
    pub(super) fn insert(&mut self, ids: &[u32], value: T, bytes: usize, shared: Vec<(usize, usize)>) {
        let node = self.node_at(ids);
        self.take(node);
        self.bytes += bytes;
        for &(part, bytes) in &shared {
            let holders = self.shared.entry(part).or_default();
            self.bytes += if *holders == 0 { bytes } else { 0 };
            *holders += 1;
        }
        self.nodes[node].value = Some(Value { value, bytes, shared, used: 0 });
        self.touch(node);
    }

    /// Drops the value that was not used for the longest time; whether there was one.
    pub(super) fn evict(&mut self) -> bool {
        let Some((_, node)) = self.order.pop_first() else { return false };
        self.take(node);
        self.prune(node);
        true
    }

    /// Notes that the value of a node is used now.
    fn touch(&mut self, node: usize) {
        self.clock += 1;
        if let Some(value) = &mut self.nodes[node].value {
            self.order.remove(&value.used);
            value.used = self.clock;
            self.order.insert(self.clock, node);
        }
    }

    /// Removes the value of a node.
    fn take(&mut self, node: usize) {
        if let Some(value) = self.nodes[node].value.take() {
            self.order.remove(&value.used);
            self.bytes -= value.bytes;
            for (part, bytes) in value.shared {
                let holders = self.shared.entry(part).or_default();
                *holders -= 1;
                if *holders == 0 {
                    self.shared.remove(&part);
                    self.bytes -= bytes;
                }
            }
        }
    }

    /// The node after `ids`, made if need be.
    fn node_at(&mut self, ids: &[u32]) -> usize {
        let (mut node, mut at) = (ROOT, 0);
        while at < ids.len() {
            let Some(&child) = self.nodes[node].children.get(&ids[at]) else {
                return self.add(node, ids[at..].to_vec());
            };
            let common = shared(&self.nodes[child].edge, &ids[at..]);
            node = if common < self.nodes[child].edge.len() { self.cut(child, common) } else { child };
            at += common;
        }
        node
    }

    /// A new node below another one.
    fn add(&mut self, parent: usize, edge: Vec<u32>) -> usize {
        self.bytes += size_of_val(edge.as_slice());
        let first = edge[0];
        let node = Node { edge, parent, children: BTreeMap::new(), value: None };
        let index = match self.free.pop() {
            Some(index) => {
                self.nodes[index] = node;
                index
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() - 1
            }
        };
        self.nodes[parent].children.insert(first, index);
        index
    }

    /// A new node in the middle of the edge that leads to another one.
    fn cut(&mut self, node: usize, length: usize) -> usize {
        let rest = self.nodes[node].edge.split_off(length);
        let first = std::mem::take(&mut self.nodes[node].edge);
        let parent = self.nodes[node].parent;
        self.bytes -= size_of_val(first.as_slice());
        let middle = self.add(parent, first);
        self.nodes[middle].children.insert(rest[0], node);
        self.nodes[node].parent = middle;
        self.nodes[node].edge = rest;
        middle
    }

    /// Removes a node that holds nothing any more, and those above it that were there for its sake.
    fn prune(&mut self, node: usize) {
        let children = self.nodes[node].children.len();
        if node == ROOT || self.nodes[node].value.is_some() || children > 1 {
            return;
        }
        let parent = self.nodes[node].parent;
        let edge = std::mem::take(&mut self.nodes[node].edge);
        self.free.push(node);
        match std::mem::take(&mut self.nodes[node].children).into_values().next() {
            Some(child) => {
                // Its only child takes its place; the parent still parts there.
                self.nodes[parent].children.insert(edge[0], child);
                self.nodes[child].parent = parent;
                let rest = std::mem::replace(&mut self.nodes[child].edge, edge);
                self.nodes[child].edge.extend(rest);
            }
            None => {
                self.bytes -= size_of_val(edge.as_slice());
                self.nodes[parent].children.remove(&edge[0]);
                self.prune(parent);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks what must hold of every tree, and returns its values by the tokens before them.
    fn contents(tree: &Tree<u64>) -> BTreeMap<Vec<u32>, u64> {
        let (mut out, mut bytes, mut nodes) = (BTreeMap::new(), 0, 0);
        let mut parts = HashMap::new();
        let mut open = vec![(ROOT, vec![])];
        while let Some((index, path)) = open.pop() {
            let node = &tree.nodes[index];
            nodes += 1;
            bytes += 4 * node.edge.len() + node.value.as_ref().map_or(0, |value| value.bytes);
            assert!(index == ROOT || node.value.is_some() || node.children.len() > 1, "a node for nothing");
            if let Some(value) = &node.value {
                assert_eq!(tree.order.get(&value.used), Some(&index));
                parts.extend(value.shared.iter().copied());
                out.insert(path.clone(), value.value);
            }
            for (&first, &child) in &node.children {
                assert_eq!((tree.nodes[child].parent, tree.nodes[child].edge[0]), (index, first));
                open.push((child, [path.as_slice(), &tree.nodes[child].edge].concat()));
            }
        }
        bytes += parts.values().sum::<usize>();
        assert_eq!((tree.bytes(), tree.states()), (bytes, out.len()));
        assert_eq!(tree.shared.len(), parts.len());
        assert_eq!(nodes + tree.free.len(), tree.nodes.len());
        out
    }

    proptest! {
        /// Against a list in the order of use.
        #[test]
        fn equals_a_list(
            steps in prop::collection::vec((0u8..4, prop::collection::vec(0u32..3, 0..7)), 1..60),
        ) {
            let mut tree = Tree::new();
            let mut list: Vec<(Vec<u32>, u64)> = vec![]; // the last one was used last
            for (i, (what, ids)) in steps.into_iter().enumerate() {
                match what {
                    0 => {
                        prop_assert_eq!(tree.evict(), !list.is_empty());
                        list.drain(..list.len().min(1));
                    }
                    1 => {
                        let found = tree.find(&ids, |_, value| value % 3 > 0);
                        let known = list.iter().map(|(path, _)| shared(path, &ids)).max().unwrap_or(0);
                        let best = list.iter().enumerate()
                            .filter(|(_, (path, value))| ids.starts_with(path) && value % 3 > 0)
                            .max_by_key(|(_, (path, _))| path.len());
                        prop_assert_eq!(found.known, known);
                        prop_assert_eq!(found.state.copied(), best.map(|(_, (_, value))| *value));
                        prop_assert_eq!(found.depth, best.map_or(0, |(_, (path, _))| path.len()));
                        if let Some((at, _)) = best {
                            let used = list.remove(at);
                            list.push(used);
                        }
                    }
                    _ => {
                        // Those that begin alike share a part.
                        let shared = ids.iter().take(2).map(|&id| (id as usize, 100 + id as usize)).collect();
                        tree.insert(&ids, i as u64, 10, shared);
                        list.retain(|(path, _)| *path != ids);
                        list.push((ids, i as u64));
                    }
                }
                prop_assert_eq!(contents(&tree), list.iter().cloned().collect());
            }
        }
    }
}
