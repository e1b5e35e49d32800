-- What Quarto does and pandoc does not: numbered figures, tables and sections, references to them, callouts.
-- A reference without a target stops the rendering.

local names = { fig = 'Figure', tbl = 'Table', sec = 'Section', eq = 'Equation', lst = 'Listing' }
local counts, labels, missing = {}, {}, {}
local levels = {}

local function kind(identifier)
  return names[identifier:match('^(%a+)%-') or '']
end

local function numbered(identifier)
  local name = kind(identifier)
  counts[name] = (counts[name] or 0) + 1
  labels[identifier] = name .. '\u{a0}' .. counts[name]
  return labels[identifier]
end

local function with_label(inlines, label)
  local result = pandoc.Inlines{ pandoc.Strong{ pandoc.Str(label .. '.') }, pandoc.Space() }
  result:extend(inlines)
  return result
end

local function section(header)
  if header.classes:includes('unnumbered') then return nil end
  local level = header.level
  levels[level] = (levels[level] or 0) + 1
  for deeper = level + 1, 6 do levels[deeper] = 0 end
  if header.identifier:match('^sec%-') then
    local parts = {}
    for i = 1, level do parts[i] = tostring(levels[i] or 0) end
    labels[header.identifier] = 'Section\u{a0}' .. table.concat(parts, '.')
  end
end

local function alternative(image)
  local alt = image.attributes['fig-alt']
  if alt then
    image.attributes['fig-alt'] = nil
    image.caption = pandoc.Inlines{ pandoc.Str(alt) }
  end
  return image
end

-- A float: content, then the caption as the last paragraph.
local function float(div)
  local label = numbered(div.identifier)
  local caption = div.content:remove(#div.content)
  local body = div.content:walk{ Image = alternative }
  body = body:map(function(block)
    if block.t == 'Figure' then return block.content[1] end
    if block.t == 'Table' and FORMAT:match('html') then return pandoc.Div({ block }, { class = 'table-scroll' }) end
    return block
  end)
  local inlines = with_label(caption.content, label)
  if FORMAT:match('html') then
    local text = pandoc.Div({ pandoc.Plain(inlines) }, { class = 'float-caption' })
    if kind(div.identifier) == 'Table' then body:insert(1, text) else body:insert(text) end
    return pandoc.Div(body, { id = div.identifier, class = 'float' })
  end
  if kind(div.identifier) == 'Table' then
    -- The caption stays with the table, which may go over pages.
    body:insert(1, pandoc.RawBlock('typst', '#block(sticky: true)['))
    body:insert(2, pandoc.Para(inlines))
    body:insert(3, pandoc.RawBlock('typst', ']'))
  else
    -- As Quarto has it: a figure of this kind, which `_quarto.yml` lets float to the top or foot of a page.
    body:insert(1, pandoc.RawBlock('typst', '#figure(kind: "quarto-float-fig", supplement: none, numbering: none)[#set align(left)'))
    body:insert(pandoc.Para(inlines))
    body:insert(pandoc.RawBlock('typst', '] <' .. div.identifier .. '>'))
    return body -- without a block around it, in which it could not float
  end
  return pandoc.Div(body, { id = div.identifier })
end

local function callout(div)
  for _, class in ipairs(div.classes) do
    local what = class:match('^callout%-(%a+)')
    if what then
      local title = pandoc.Inlines{ pandoc.Str((what:gsub('^%l', string.upper))) }
      if div.content[1] and div.content[1].t == 'Header' then title = div.content:remove(1).content end
      local heading = pandoc.Div({ pandoc.Plain{ pandoc.Strong(title) } }, { class = 'callout-title' })
      div.content:insert(1, pandoc.RawBlock('typst', '#block(sticky: true)['))
      div.content:insert(2, heading)
      div.content:insert(3, pandoc.RawBlock('typst', ']'))
      div.classes:insert('callout')
      return div
    end
  end
end

local collect = {
  traverse = 'topdown',
  Header = section,
  Div = function(div)
    if kind(div.identifier) then return float(div), false end
    local changed = callout(div)
    if changed then return changed, false end
  end,
  Image = alternative,
}

local resolve = {
  Cite = function(cite)
    local first = cite.citations[1].id
    if labels[first] then return pandoc.Link(labels[first], '#' .. first) end
    if kind(first) then missing[#missing + 1] = first end
  end,
  Pandoc = function(document)
    if #missing > 0 then error('unresolved references: ' .. table.concat(missing, ', ')) end
    local why = document.meta['why-preview'] and pandoc.utils.stringify(document.meta['why-preview']) or ''
    local note = 'A preview of the paper, rendered without Quarto from the same sources; numbering and layout of the '
      .. 'real page may differ. ' .. why
    document.blocks:insert(1, pandoc.Div({ pandoc.Plain{ pandoc.Str(note) } }, { class = 'preview-banner' }))
    return document
  end,
}

return { collect, resolve }
