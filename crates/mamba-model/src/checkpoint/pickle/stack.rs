//! What the machine works on, and how much of it there may be.
//!
//! Values refer to each other by number into tables, so that a pickle can build neither cycles that are followed nor
//! towers that overflow a call stack.

use std::collections::HashMap;

use super::value::{Pickle, Value};

/// Values that may lie on the stack at once; torch writes a dictionary in batches of a thousand items.
const MAX_STACK: usize = 1 << 16;
/// Tuples, dictionaries, storages, tensors and memo entries that a pickle may make; torch needs 14 for a tensor.
const MAX_OBJECTS: usize = 1 << 20;

/// A step of the machine, or why there is none, to be read behind "at byte 7, ".
pub(super) type Step<T> = Result<T, String>;

pub(super) const SHORT: &str = "a value is missing";

/// The state of a machine.
pub(super) struct Machine<'a> {
    pub input: &'a [u8],
    pub at: usize,
    pub stack: Vec<Value<'a>>,
    pub marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    pub heap: Pickle<'a>,
}

impl<'a> Machine<'a> {
    pub fn new(input: &'a [u8]) -> Self {
        let (stack, marks, memo) = (Vec::new(), Vec::new(), HashMap::new());
        Self { input, at: 0, stack, marks, memo, heap: Pickle::default() }
    }

    pub fn take(&mut self, len: usize) -> Step<&'a [u8]> {
        let bytes = self.input[self.at..].get(..len).ok_or("it is cut off")?;
        self.at += len;
        Ok(bytes)
    }

    pub fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| "it is cut off".into())
    }

    pub fn line(&mut self) -> Step<&'a str> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or("it is cut off")?;
        let line = std::str::from_utf8(&rest[..len]).map_err(|_| "a name that is not UTF-8")?;
        self.at += len + 1;
        Ok(line)
    }

    fn room(&self, have: usize, limit: usize) -> Step<()> {
        if have < limit { Ok(()) } else { Err(format!("it needs more than {limit} values")) }
    }

    pub fn push(&mut self, value: Value<'a>) -> Step<()> {
        self.room(self.stack.len(), MAX_STACK)?;
        self.stack.push(value);
        Ok(())
    }

    /// Takes the topmost value, which has to lie above the last mark.
    pub fn pop(&mut self) -> Step<Value<'a>> {
        if self.marks.last().is_some_and(|mark| *mark >= self.stack.len()) {
            return Err(SHORT.into());
        }
        self.stack.pop().ok_or_else(|| SHORT.into())
    }

    pub fn set_mark(&mut self) -> Step<()> {
        self.room(self.marks.len(), MAX_STACK)?;
        self.marks.push(self.stack.len());
        Ok(())
    }

    /// Takes the last mark: the place on the stack where it was set.
    pub fn mark(&mut self) -> Step<usize> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        // What was taken since may have reached below the mark.
        if mark > self.stack.len() { Err(SHORT.into()) } else { Ok(mark) }
    }

    pub fn expect_top(&self, value: Value<'a>) -> Step<()> {
        if self.stack.last() == Some(&value) { Ok(()) } else { Err("a list is missing".into()) }
    }

    /// Counts all that lives as long as the machine.
    pub fn room_on_heap(&self) -> Step<()> {
        let heap = &self.heap;
        let objects = heap.tuples.len() + heap.dicts.len() + heap.storages.len() + heap.tensors.len();
        self.room(objects + self.memo.len(), MAX_OBJECTS)
    }

    pub fn new_dict(&mut self) -> Step<()> {
        self.room_on_heap()?;
        self.heap.dicts.push(Vec::new());
        self.push(Value::Dict(self.heap.dicts.len() - 1))
    }

    pub fn new_tuple(&mut self, start: usize) -> Step<()> {
        if self.marks.last().is_some_and(|mark| *mark > start) {
            return Err(SHORT.into());
        }
        self.room_on_heap()?;
        let items = self.stack.split_off(start);
        self.heap.tuples.push(items.into());
        self.push(Value::Tuple(self.heap.tuples.len() - 1))
    }

    pub fn remember(&mut self, key: u32) -> Step<()> {
        self.room_on_heap()?;
        let top = *self.stack.last().ok_or(SHORT)?;
        self.memo.insert(key, top);
        Ok(())
    }

    pub fn recall(&mut self, key: u32) -> Step<()> {
        let value = *self.memo.get(&key).ok_or_else(|| format!("memo {key} is empty"))?;
        self.push(value)
    }
}
