//! A machine for the pickles that `torch.save` writes, and for no others.
//!
//! Values refer to each other by number into tables of the machine, so that a pickle can build neither cycles that
//! are followed nor towers that overflow a call stack. Work and memory are linear in the length of the pickle.

use std::collections::HashMap;

use super::value::{Global, Pickle, Storage, TensorView, Value};

/// Values that may lie on the stack at once; torch writes a dictionary in batches of a thousand items.
const MAX_STACK: usize = 1 << 16;
/// Tuples, dictionaries, storages, tensors and memo entries that a pickle may make; torch needs 14 for a tensor.
const MAX_OBJECTS: usize = 1 << 20;
/// Axes of a tensor: sizes are copied into each tensor, so that their number has to be small.
const MAX_RANK: usize = 8;

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    heap: Pickle<'a>,
}

type Step<T> = Result<T, String>;

/// Runs a pickle to its end, or says why it is not one that `torch.save` writes for tensors.
pub(super) fn run(input: &[u8]) -> Step<Pickle<'_>> {
    let mut machine = Machine {
        input,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        heap: Pickle::default(),
    };
    loop {
        let at = machine.at;
        match machine.step() {
            Ok(false) => {}
            Ok(true) => return Ok(machine.heap),
            Err(message) => return Err(format!("is not a plain pickle of tensors: at byte {at}, {message}")),
        }
    }
}

impl<'a> Machine<'a> {
    /// Runs one instruction; true at the end of the program.
    fn step(&mut self) -> Step<bool> {
        let [op] = self.array()?;
        match op {
            b'\x80' => match self.array()? {
                [2] => {}
                [version] => return Err(format!("pickle protocol {version}, where torch.save writes 2")),
            },
            b'}' => self.new_dict()?,
            b']' | b'N' => self.push(Value::Opaque)?,
            b'G' => {
                let _: [u8; 8] = self.array()?;
                self.push(Value::Opaque)?;
            }
            b'\x88' | b'\x89' => self.push(Value::Bool)?,
            b'J' => {
                let n = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()))?;
            }
            b'K' => {
                let [n] = self.array()?;
                self.push(Value::Int(n.into()))?;
            }
            b'M' => {
                let n = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(n.into()))?;
            }
            b'\x8a' => self.long()?,
            b'X' => {
                let len = u32::from_le_bytes(self.array()?);
                let bytes = self.take(len as usize)?;
                let text = std::str::from_utf8(bytes).map_err(|_| "a string that is not UTF-8")?;
                self.push(Value::Str(text))?;
            }
            b'c' => self.global()?,
            b'(' => {
                self.room(self.marks.len(), MAX_STACK)?;
                self.marks.push(self.stack.len());
            }
            b')' => self.new_tuple(self.stack.len())?,
            b'\x85' | b'\x86' | b'\x87' => {
                let len = usize::from(op - b'\x84');
                self.new_tuple(self.stack.len().checked_sub(len).ok_or(SHORT)?)?;
            }
            b't' => {
                let mark = self.mark()?;
                self.new_tuple(mark)?;
            }
            b'q' => {
                let [key] = self.array()?;
                self.remember(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.remember(key)?;
            }
            b'h' => {
                let [key] = self.array()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            b'a' => {
                self.pop()?;
                self.expect_top(Value::Opaque)?;
            }
            b'e' => {
                let mark = self.mark()?;
                self.stack.truncate(mark);
                self.expect_top(Value::Opaque)?;
            }
            b's' => {
                let start = self.stack.len().checked_sub(2).ok_or(SHORT)?;
                self.set_items(start)?;
            }
            b'u' => {
                let mark = self.mark()?;
                self.set_items(mark)?;
            }
            b'b' => {
                // The attributes of a dictionary: `_metadata`, with versions of modules.
                self.pop()?;
                let Some(Value::Dict(_)) = self.stack.last() else {
                    return Err("attributes of something that is not a dictionary".into());
                };
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'.' => {
                self.heap.root = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() || self.at != self.input.len() {
                    return Err("it ends with values or bytes left over".into());
                }
                return Ok(true);
            }
            other => return Err(format!("instruction 0x{other:02x}, which torch.save does not write")),
        }
        Ok(false)
    }

    fn take(&mut self, len: usize) -> Step<&'a [u8]> {
        let bytes = self.input[self.at..].get(..len).ok_or("it is cut off")?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| "it is cut off".into())
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or("it is cut off")?;
        let line = std::str::from_utf8(&rest[..len]).map_err(|_| "a name that is not UTF-8")?;
        self.at += len + 1;
        Ok(line)
    }

    fn room(&self, have: usize, limit: usize) -> Step<()> {
        if have < limit { Ok(()) } else { Err(format!("it needs more than {limit} values")) }
    }

    fn push(&mut self, value: Value<'a>) -> Step<()> {
        self.room(self.stack.len(), MAX_STACK)?;
        self.stack.push(value);
        Ok(())
    }

    /// Takes the topmost value, which has to lie above the last mark.
    fn pop(&mut self) -> Step<Value<'a>> {
        if self.marks.last().is_some_and(|mark| *mark >= self.stack.len()) {
            return Err(SHORT.into());
        }
        self.stack.pop().ok_or_else(|| SHORT.into())
    }

    fn mark(&mut self) -> Step<usize> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        // What was taken since may have reached below the mark.
        if mark > self.stack.len() { Err(SHORT.into()) } else { Ok(mark) }
    }

    fn expect_top(&self, value: Value<'a>) -> Step<()> {
        if self.stack.last() == Some(&value) { Ok(()) } else { Err("a list is missing".into()) }
    }

    /// Counts all that lives as long as the machine.
    fn room_on_heap(&self) -> Step<()> {
        let heap = &self.heap;
        let objects = heap.tuples.len() + heap.dicts.len() + heap.storages.len() + heap.tensors.len();
        self.room(objects + self.memo.len(), MAX_OBJECTS)
    }

    fn new_dict(&mut self) -> Step<()> {
        self.room_on_heap()?;
        self.heap.dicts.push(Vec::new());
        self.push(Value::Dict(self.heap.dicts.len() - 1))
    }

    fn new_tuple(&mut self, start: usize) -> Step<()> {
        if self.marks.last().is_some_and(|mark| *mark > start) {
            return Err(SHORT.into());
        }
        self.room_on_heap()?;
        let items = self.stack.split_off(start);
        self.heap.tuples.push(items.into());
        self.push(Value::Tuple(self.heap.tuples.len() - 1))
    }

    fn remember(&mut self, key: u32) -> Step<()> {
        self.room_on_heap()?;
        let top = *self.stack.last().ok_or(SHORT)?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step<()> {
        let value = *self.memo.get(&key).ok_or_else(|| format!("memo {key} is empty"))?;
        self.push(value)
    }

    /// An integer of up to eight bytes, lowest first.
    fn long(&mut self) -> Step<()> {
        let [len] = self.array()?;
        let bytes = self.take(len.into())?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = if negative { [0xff; 8] } else { [0; 8] };
        wide.get_mut(..bytes.len()).ok_or("an integer of more than eight bytes")?.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    fn global(&mut self) -> Step<()> {
        let (module, name) = (self.line()?, self.line()?);
        let global = Global::named(module, name).ok_or_else(|| {
            let full = format!("{module}.{name}");
            let short: String = full.chars().take(80).flat_map(char::escape_default).collect();
            format!("a reference to `{short}`, which a checkpoint of plain tensors does not need")
        })?;
        self.push(Value::Global(global))
    }

    fn set_items(&mut self, start: usize) -> Step<()> {
        if self.marks.last().is_some_and(|mark| *mark > start) {
            return Err(SHORT.into());
        }
        let items = self.stack.split_off(start);
        let Some(Value::Dict(id)) = self.stack.last() else { return Err("a dictionary is missing".into()) };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        self.heap.dicts[*id].extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    /// `("storage", class, key, device, number of elements)` becomes a storage.
    fn storage(&mut self) -> Step<()> {
        self.room_on_heap()?;
        let fields = self.pop()?;
        let Value::Tuple(id) = fields else { return Err(NO_STORAGE.into()) };
        let &[
            Value::Str("storage"),
            Value::Global(Global::Storage(kind)),
            Value::Str(key),
            Value::Str(_),
            len,
        ] = &*self.heap.tuples[id]
        else {
            return Err(NO_STORAGE.into());
        };
        let len = size(len)?;
        self.heap.storages.push(Storage { kind, key, len });
        self.push(Value::Storage(self.heap.storages.len() - 1))
    }

    fn call(&mut self) -> Step<()> {
        self.room_on_heap()?;
        let (args, callee) = (self.pop()?, self.pop()?);
        let (Value::Global(callee), Value::Tuple(args)) = (callee, args) else {
            return Err("a call of something that is not a name".into());
        };
        match (callee, &*self.heap.tuples[args]) {
            (Global::OrderedDict, []) => self.new_dict(),
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), _, _]) => self.push(*tensor),
            (
                Global::RebuildTensor,
                [Value::Storage(storage), offset, Value::Tuple(shape), Value::Tuple(strides), _, _],
            ) => {
                let (shape, strides) = (&self.heap.tuples[*shape], &self.heap.tuples[*strides]);
                if shape.len() != strides.len() || shape.len() > MAX_RANK {
                    let (shape, strides) = (shape.len(), strides.len());
                    return Err(format!("a tensor with {shape} sizes and {strides} strides"));
                }
                let sizes = |tuple: &[Value]| tuple.iter().map(|n| size(*n)).collect::<Step<Box<[usize]>>>();
                let (shape, strides) = (sizes(shape)?, sizes(strides)?);
                let view = TensorView { storage: *storage, offset: size(*offset)?, shape, strides };
                self.heap.tensors.push(view);
                self.push(Value::Tensor(self.heap.tensors.len() - 1))
            }
            _ => Err("a call with arguments that torch.save does not write".into()),
        }
    }
}

const SHORT: &str = "a value is missing";
const NO_STORAGE: &str = "a reference to an object that is not a storage";

fn size(value: Value) -> Step<usize> {
    match value {
        Value::Int(n) => usize::try_from(n).map_err(|_| format!("{n} as a size")),
        _ => Err("something that is not a number as a size".into()),
    }
}
