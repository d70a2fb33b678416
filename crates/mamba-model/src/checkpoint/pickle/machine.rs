//! A machine for the pickles that `torch.save` writes, and for no others: its instructions.
//!
//! Work and memory are linear in the length of the pickle.

use super::stack::{Machine, SHORT, Step};
use super::value::{Global, Pickle, Storage, TensorView, Value};

/// Axes of a tensor: sizes are copied into each tensor, so that their number has to be small.
const MAX_RANK: usize = 8;

/// Runs a pickle to its end, or says why it is not one that `torch.save` writes for tensors.
pub(super) fn run(input: &[u8]) -> Step<Pickle<'_>> {
    let mut machine = Machine::new(input);
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
            b'(' => self.set_mark()?,
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

const NO_STORAGE: &str = "a reference to an object that is not a storage";

fn size(value: Value) -> Step<usize> {
    match value {
        Value::Int(n) => usize::try_from(n).map_err(|_| format!("{n} as a size")),
        _ => Err("something that is not a number as a size".into()),
    }
}
